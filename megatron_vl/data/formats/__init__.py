"""Raw data formats: one module each, all giving the conversations of `megatron_vl.data.samples`."""
