"""Logs and journals into input models."""
