"""Our own kernels: C++ in ``csrc``, how it is compiled, and the calls into it."""
