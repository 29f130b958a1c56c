"""The kernels as `torch.library` ops, for autograd, `torch.compile` and `torch.export`."""
