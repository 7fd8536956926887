"""swift_cl: continual learning on top of ms-swift.

Importing this package is free of side effects: it imports neither torch nor ms-swift and changes nothing in them.
"""

__version__ = "0.1.0"
