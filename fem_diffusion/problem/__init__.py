"""The inverse problem in Firedrake's words: physics, prior, observation operator."""
