"""A policy behind a websocket, for the clients of openpi's protocol; docs/deploy.md."""
