"""Which node this is, where the nodes meet, and the ranks: started, started again, ended."""
