"""A run's privacy in one record: the server's, under the name that simulations know it by."""

from server.privacy_record import PrivacyRecord, SiteEvent, SitePrivacy, epsilon_after, privacy_record

__all__ = ["PrivacyRecord", "SiteEvent", "SitePrivacy", "epsilon_after", "privacy_record"]
