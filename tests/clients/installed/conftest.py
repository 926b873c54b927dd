"""The option that says where the pictures go."""


def pytest_addoption(parser):
    parser.addoption("--pictures", help="folder for pictures of what the programs found, side by side")
