"""Raw data to shards: what people bring is read, checked and written for energon."""
