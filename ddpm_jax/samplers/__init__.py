"""Samplers: values that describe a reverse chain; one `lax.scan` runs any of them."""
