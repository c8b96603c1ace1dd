"""Damaged and hostile files by the thousand: each ends in success, a `UserError` or a quarantined window."""
