"""What a real deployment on this machine does when something breaks: each fault injected, each row judged by code."""
