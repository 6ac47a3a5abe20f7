"""Models that answer questions: fVLM and the models it is compared with, behind one interface (`answerer`)."""
