# cmake -DCOMMAND="a;b" -DMESSAGE=regex -P expect_failure.cmake: passes if the command fails and says so.
execute_process(COMMAND ${COMMAND} RESULT_VARIABLE result ERROR_VARIABLE text OUTPUT_VARIABLE text)
if(result EQUAL 0)
  message(FATAL_ERROR "the fault went unnoticed: ${COMMAND}\n${text}")
elseif(NOT text MATCHES "${MESSAGE}")
  message(FATAL_ERROR "failed with '${result}', but without '${MESSAGE}':\n${text}")
endif()
