"""Pipelines of diffusers as users have them: opened, recorded call by call, and with another module in the place of a part."""
