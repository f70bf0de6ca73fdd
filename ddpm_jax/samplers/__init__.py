"""Samplers: rules that take noise to images, each a value; one `lax.scan` runs any of them."""
