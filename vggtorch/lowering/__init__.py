"""A Keras model as a torch network on the same memory, run the fast way; and its export."""
