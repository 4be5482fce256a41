"""The steps of a release: wheels, their checks, and their tests in new environments."""
