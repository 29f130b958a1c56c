"""From a float weight to codes, scales and zeros (`GroupwiseInt4`)."""
