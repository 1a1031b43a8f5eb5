"""A file of conversations and a folder of images -> a TFDS data set."""
