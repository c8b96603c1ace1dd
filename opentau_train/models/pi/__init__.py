"""pi0 and pi0.5 (Physical Intelligence 2024, 2025): a vision-language model with an action expert beside each layer."""
