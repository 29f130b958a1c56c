"""From one model directory to another, in bounded memory."""
