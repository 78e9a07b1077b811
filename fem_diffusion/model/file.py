"""A trained model as a file: fields by keys of the mesh, tensors and settings, and checks that they make up a model."""
