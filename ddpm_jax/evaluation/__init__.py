"""What a trained run is worth: bits/dim over a whole set of images, and how close its samples are to real ones."""
