"""Files, hosts, devices, progress, pictures and exits. Knows nothing of diffusion."""
