"""The exporter of mllama-deploy: checkpoint -> graphs -> validated bundle."""
