"""Stage 3: where the models look and what they answer, measured, printed and drawn."""
