"""VGG11 to VGG19, their weights in and out, and what they expect of an image."""
