"""From a PyTorch CNN to a verified engine on the device: the public names, on one screen."""
