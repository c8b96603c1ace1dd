"""From what a source declares of its actions and state to what a training wants of them, and back for a robot."""
