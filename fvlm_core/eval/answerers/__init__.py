"""Models that questions can be put to: ours, and those it is compared with, behind one form (`answerer`)."""
