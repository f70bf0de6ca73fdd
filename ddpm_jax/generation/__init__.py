"""Images from a trained run: sampling jobs, and edits of given images."""
