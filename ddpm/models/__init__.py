"""Networks: callables (x_t, t) -> output of the shape of x_t, knowing neither the noise schedule nor the data."""
