"""The profile room: a few steps of a run, measured: their time by part, and their memory by part over the operators.

profile.py is the story; clock.py takes times by the marks that a step leaves, timeline.py its live bytes.
Public: profile, Profile.
"""

from lite.profile.profile import Profile, profile

__all__ = ["Profile", "profile"]
