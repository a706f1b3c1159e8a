"""Raw data to shards, shards to batches of packed rows."""
