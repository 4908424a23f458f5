"""Products of states and weights by kernels, for few rows and for many, packed and plain."""
