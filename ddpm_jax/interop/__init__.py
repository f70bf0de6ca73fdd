"""Other systems' weights: read, and converted into a configuration and parameters of ours."""
