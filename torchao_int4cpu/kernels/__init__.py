"""Which kernel multiplies with a packed weight, on plain tensors: no tensor class is known here."""
