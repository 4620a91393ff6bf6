"""The embedded model's world: scenes, captions, checker, training and scoring."""
