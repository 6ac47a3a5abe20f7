"""Models that can be asked questions: ours, and those it is compared with, behind one interface (`answerer`)."""
