"""Conversations: their rendering to token ids and mask, and one as it goes on."""
