"""What the inputs of a model say of its weights, block by block, and weights quantized by it."""
