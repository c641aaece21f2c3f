#pragma once

// The calling thread's last error, as monarch_last_error() reports it.

#include <string>

void         monarch_error_set(const std::string & error);
const char * monarch_error_get();
