"""Settings shared by every test."""

from hypothesis import settings

settings.register_profile("neuronrank", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("neuronrank")
