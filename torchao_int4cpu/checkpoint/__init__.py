"""Our own file formats: pickles, safetensors, and what a file holds."""
