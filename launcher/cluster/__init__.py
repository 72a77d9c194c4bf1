"""A cluster of the user's own machines: reached over ssh, checked, brought up with Ray, taken down."""
