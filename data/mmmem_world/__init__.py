"""The procedural world as a TensorFlow Datasets data set, for those who want it on disk."""
