"""From a trained policy to a robot: observations in, actions in the robot's units out. Nothing else imports it."""
