"""Cut, extend, rearrange and replace layers by name."""
