//! What a handshake that failed says to a person.

use std::io::{Error, ErrorKind};
use std::time::Duration;

use rustls::{AlertDescription, CertificateError, InvalidMessage};

/// How long a handshake may take.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a connection has no TLS.
pub(super) fn explained(error: &Error) -> String {
    if error.kind() == ErrorKind::UnexpectedEof {
        return "the peer closed the connection in the TLS handshake: expected TLS, perhaps its port is plaintext"
            .to_owned();
    }
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
    match inner {
        Some(rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType)) => {
            "expected TLS, got something else: the peer speaks plaintext".to_owned()
        }
        Some(rustls::Error::AlertReceived(alert)) => refused(*alert),
        Some(rustls::Error::NoCertificatesPresented) => {
            "expected a client certificate, got none".to_owned()
        }
        Some(rustls::Error::InvalidCertificate(CertificateError::Other(why))) => why.0.to_string(),
        _ => error.to_string(),
    }
}

fn refused(alert: AlertDescription) -> String {
    let why = match alert {
        AlertDescription::UnknownCA => "it does not know the CA of our certificate",
        AlertDescription::CertificateRequired => "it expects a client certificate, we have none",
        AlertDescription::CertificateExpired => "our certificate has expired, by its clock",
        AlertDescription::CertificateUnknown => "it does not take our certificate",
        _ => return format!("the peer refused the TLS connection: {alert:?}"),
    };
    format!("the peer refused the TLS connection: {why}")
}
