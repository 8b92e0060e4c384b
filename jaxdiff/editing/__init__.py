"""Editing: changing images, and making larger ones, with a model of images."""
