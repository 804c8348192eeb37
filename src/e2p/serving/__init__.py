"""Answers for users over HTTP: engines that generate, and the application in front of them."""
