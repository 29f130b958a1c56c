"""What `quantize_` calls: the config, its handler, and the run of `quantize_` it is called in."""
