"""Where the images come from (`sources`), and which of them a training step sees (`pipeline`)."""
